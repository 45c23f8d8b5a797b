"""Several machines, as recipes/accelerate/multi_node.yaml starts them: two agents on this one, two processes each."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import forked
import pytest
from imagenet import RECIPE, RECIPES, results

FILE = RECIPES / "accelerate" / "multi_node.yaml"
SCRIPT = """
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from hf_rwp import RWP
from hf_rwp.runs.records import weights_digest

accelerator = Accelerator()
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
optimizer = RWP(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), net)
model, optimizer = accelerator.prepare(net, optimizer)
torch.manual_seed(accelerator.process_index)
perturbed = []
for _ in range(3):
    accelerator.backward(model(torch.randn(5, 4)).square().mean())
    perturbed.append(optimizer.optimizer.role.perturbed)
    optimizer.step()
    optimizer.zero_grad()
optimizer.eval()
seen = {"machine": int(sys.argv[2]), "perturbed": perturbed, "weights": weights_digest(net)}
Path(sys.argv[1], f"rank_{accelerator.process_index}.json").write_text(json.dumps(seen))
accelerator.wait_for_everyone()  # whoever ends first takes connections with it
accelerator.end_training()
"""


def launch(*arguments, machines=2, processes=4):
    """What the agents of all machines said; each has its rank in place of MACHINE in the arguments.

    How they end is not asked for: the first takes the others' store along, which is torch's race and not the ranks'.
    """
    for _ in range(3):  # another process may take the port before the first agent does
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = ["-m", "accelerate.commands.launch", f"--config_file={FILE}", "--mixed_precision=no"]
        command += [f"--num_processes={processes}", "--main_process_ip=127.0.0.1", f"--main_process_port={port}"]

        def agent(rank, command=command):
            words = [str(word).replace("MACHINE", str(rank)) for word in arguments]
            run = forked.run(*command, f"--machine_rank={rank}", *words, ACCELERATE_USE_CPU="true")
            return run.stdout + run.stderr

        with ThreadPoolExecutor(machines) as pool:
            said = list(pool.map(agent, range(machines)))
        if not any(f"port `{port}`" in text or "EADDRINUSE" in text for text in said):
            break
    return "\n".join(said)


@pytest.mark.slow
def test_clean_and_perturbed_alternate_within_each_machine(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    said = launch(script, tmp_path, "MACHINE")
    assert len(list(tmp_path.glob("rank_*.json"))) == 4, said
    ranks = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(4)]
    assert [rank["machine"] for rank in ranks] == [0, 0, 1, 1]
    assert [rank["perturbed"] for rank in ranks] == [[False] * 3, [True] * 3] * 2
    assert len({rank["weights"] for rank in ranks}) == 1


@pytest.mark.slow
def test_imagenet_rwp_on_two_machines(tmp_path):
    flags = ["--epochs=1", "--img_size=16", "--batch_size=64", "--lr=0.02", "--report_to=none"]
    said = launch(RECIPE, *flags, f"--output_dir={tmp_path}")
    run = results(tmp_path)
    assert run["final"]["rwp"]["replicas"] == run["hardware"]["replicas"] == 4, said
    steps = run["final"]["step"]
    assert run["final"]["rwp"]["slots"] == {"clean": 2 * steps, "perturbed": 2 * steps}
    assert len(run["replicas_sha256"]) == 1
