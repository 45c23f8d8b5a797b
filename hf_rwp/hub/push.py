"""A trained model on the Hub, with a card that says how it was trained.

1. `export.save_model` writes the weights and their configuration. 2. `card.add_card` puts the model card, results.json
and pictures beside them: the folder is then what the repository will hold. 3. `push` sends it in one commit, and never
touches it. `push_to_hub` is all three. `push_later` is `push` in huggingface_hub's thread, `BackgroundPush` in a
process that can be ended.

Only huggingface_hub is imported with this module: `python -m hf_rwp.hub` starts in a second.
"""

import functools
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_session,
    get_token,
    set_client_factory,
)
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from hf_rwp.hub.card import add_card
from hf_rwp.hub.export import save_any, writes_here

if TYPE_CHECKING:
    from concurrent.futures import Future

logger = logging.getLogger(__name__)

WAITS = (2, 10, 30)  # seconds from one attempt to the next, beside those that huggingface_hub makes within each
TIMEOUT = 60  # seconds without a sign of the server; huggingface_hub itself would wait for ever
LAST_WAIT = 600  # seconds that the last push waits for one in the background, to do the whole job itself then

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt")
_STALE = ("model*.safetensors*", "adapter_model*.safetensors", "pytorch_model*.bin*", "adapter_model*.bin")
_PASSING = (408, 409, 412, 429)  # statuses, beside 500 and above, that another attempt may not meet
_HTTPError: Any = HfHubHTTPError.__bases__[0]  # of httpx or httpx2, whichever this huggingface_hub speaks with
_HINTS = {
    401: "no valid token was sent: log in with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there: it needs write access, and the repository must be yours or your team's",
    404: "the repository or branch is not there, or not for this token to see",
}


class PushError(RuntimeError):
    """A push that did not succeed; its message ends with the command that finishes it."""


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    revision: str | None = None,
    tag: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    message: str = "Upload model",
) -> str:
    """Send a folder to the Hub in one commit, and return the commit's address; what is there already is not sent.

    folder: of a model; that of a run stands for its `model`.
    Weights at the top of the repository that the folder does not have are removed by the same commit, so that there is
    one set of them. revision: a branch, made if missing. tag: of the commit. private: of a repository that is made; an
    existing public one is refused. token: as huggingface_hub has it; True is the stored one, False none.

    From then on huggingface_hub gives up on a silent server after a minute in this process, in downloads too: it has
    no setting for one call.

    Raises PushError once huggingface_hub's attempts, and some more with growing pauses, have failed.
    """
    folder = next(filter(_holds_weights, (Path(folder), Path(folder) / "model")), None) or Path(folder)
    if not _holds_weights(folder):
        raise ValueError(f"{folder} holds no weights: a push would remove those on the Hub. Name a model's folder")
    for wait in (*WAITS, None):
        try:
            return _push_once(HfApi(token=token), folder, repo_id, revision, tag, private, message)
        except PushError:  # refused: no command is to finish it
            raise
        except (_HTTPError, OSError, RuntimeError, ValueError) as error:
            said = _described(error, token)
            if wait is None or not _passes(error):
                command = hf_upload(folder, repo_id, revision=revision, tag=tag, private=private)
                raise PushError(
                    f"the push to {repo_id} failed: {said}\n{folder} holds all of it. This finishes the push:\n\n"
                    f"    {command}"
                ) from None  # nobody knows what a cause's own text quotes
            logger.warning("push to %s: %s. Trying again in %s s", repo_id, said, wait)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def push_later(folder: str | os.PathLike[str], repo_id: str, **options: Any) -> "Future[str]":
    """`push` in a thread, after the earlier ones."""
    future = HfApi().run_as_future(push, folder, repo_id, **options)
    future.add_done_callback(_say_if_it_failed)
    return future


def _say_if_it_failed(done: "Future[str]") -> None:
    if done.exception() is not None:
        logger.error("%s", done.exception())


def reserve(repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> None:
    """Make the repository ahead of a long run. Raises PushError if it will never be writable; warns if it may be."""
    try:
        _limit_patience()
        _create(HfApi(token=token), repo_id, private)
    except (_HTTPError, OSError, RuntimeError, ValueError) as error:
        if _status(error) in _HINTS or isinstance(error, PushError):
            raise PushError(f"{repo_id} cannot be pushed to: {_described(error, token)}") from None
        logger.warning(
            "%s cannot be reached now (%s): training goes on, and the push is tried again later",
            repo_id,
            _described(error, token),
        )


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    results: Mapping[str, Any] | None = None,
    rwp: Any = None,
    metrics: Mapping[str, float] | None = None,
    folder: str | os.PathLike[str] | None = None,
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
    pictures: Sequence[str | os.PathLike[str]] = (),
    revision: str | None = None,
    tag: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    message: str = "Upload model",
    **facts: Any,
) -> str:
    """
    Save a trained model with its card, and push both to the Hub.

    Where a mesh of processes holds the weights (FSDP2, tensor parallelism), all of them call it, and the first pushes.

    Args:
        model (`torch.nn.Module`):
            A model of timm, transformers or PEFT, or any other.
        repo_id (`str`):
            Where on the Hub: `USER/NAME`.
        results (`Mapping[str, Any]`, *optional*):
            What a recipe's results.json holds, or as much of it as is known.
        rwp ([`RWP`], *optional*):
            The optimizer wrapper: the card then says what it did. On many processes call its `report()` on all of them
            instead, and pass it as `results["final"]["rwp"]`.
        metrics (`Mapping[str, float]`, *optional*):
            `top1` and `top5`, fractions in [0, 1].
        folder (`str` or `os.PathLike`, *optional*, defaults to `outputs/NAME`):
            Where the model is written first.
        label_names (`Sequence[str]`, *optional*):
            The classes' names, by index, of a timm model.
        data_config (`Mapping[str, Any]`, *optional*):
            The preprocessing of a timm model, as `timm.data.resolve_data_config` gives.
        model_args (`Mapping[str, Any]`, *optional*):
            The arguments of `timm.create_model` beside the classes.
        pictures (`Sequence[str | os.PathLike]`, *optional*):
            Files that the card shows: curves.png and landscape.png.
        revision (`str`, *optional*):
            A branch, made if missing.
        tag (`str`, *optional*):
            Of the commit.
        private (`bool`, *optional*):
            Whether a repository that is made is private; an existing public one is then refused.
        token (`str` or `bool`, *optional*):
            As huggingface_hub takes it: `True` is the stored one, `False` none.
        message (`str`, *optional*, defaults to `"Upload model"`):
            Of the commit.
        facts (*optional*):
            What else the card says: `license`, `dataset`, `base_model`, `note`, `tags`, `data`, `split`.

    Returns:
        `str`: the commit's address; empty in a process that did not push.

    Raises PushError if the push failed; the folder is complete by then.
    """
    metrics = {name: float(value) for name, value in (metrics or {}).items()}
    outside = [f"{name}={value}" for name, value in metrics.items() if not 0 <= value <= 1]
    if outside:
        raise ValueError(f"metrics are fractions in [0, 1], and these are not: {', '.join(outside)}")
    if rwp is not None:
        rwp.eval()
    target = Path(folder if folder is not None else Path("outputs") / repo_id.split("/")[-1])
    of_model = save_any(model, target, label_names=label_names, data_config=data_config, model_args=model_args)
    known = dict(results or {})
    known["final"] = {**known.get("final", {}), **metrics}
    arguments = {"method": "base", **known.get("arguments", {})}
    if rwp is not None:
        arguments |= {"method": "rwp"}
        known["final"] |= {"rwp": rwp.report() | {"gamma": rwp.defaults["rwp_gamma"]}}
    known["arguments"] = arguments
    if not writes_here(model):
        return ""
    add_card(target, known, pictures=pictures, repo_id=repo_id, **{**of_model, **facts})
    return push(target, repo_id, revision=revision, tag=tag, private=private, token=token, message=message)


class BackgroundPush:
    """Pushes beside a training, one at a time, each in a process of its own: the training pays for links to files.

    A thread, such as `push_later`'s, cannot be ended: Python waits for it at exit, so that a run which is preempted, or
    one of whose replicas failed, would hang until the upload is done.

    folder: for what is being pushed. A failure is told on stderr, and does not stop the training.
    """

    def __init__(self, folder: Path, repo_id: str, *, revision: str | None, private: bool | None) -> None:
        self._copy = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._command = [sys.executable, "-m", "hf_rwp.hub", "push", str(folder), repo_id]
        self._command += ["--revision", revision] if revision else []
        self._command += ["--private"] if private else []

    @property
    def busy(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, folder: Path, message: str) -> None:
        """Push `folder` as it is now, unless an earlier push is still under way."""
        if self.busy:
            return
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(folder, self._copy, copy_function=_link)
        self._process = subprocess.Popen([*self._command, "--message", message], stdin=subprocess.DEVNULL)

    def finish(self) -> None:
        """Wait for the push under way, and end it after `LAST_WAIT` seconds."""
        if self._process is not None:
            try:
                self._process.wait(LAST_WAIT)
            except subprocess.TimeoutExpired:
                logger.warning("the push in the background is not done after %s s, and is ended", LAST_WAIT)
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._copy, ignore_errors=True)

    def stop(self) -> None:
        """End the push under way: nothing of it reaches the repository."""
        if self._process is not None:
            self._process.terminate()
        self.finish()


def hf_upload(
    folder: Path, repo_id: str, *, revision: str | None = None, tag: str | None = None, private: bool | None = None
) -> str:
    """The command line that does what `push` does, with huggingface_hub only.

    It removes other weights by the names that libraries look for: `*` reaches into folders, which `push` leaves alone.
    """
    upload = ["hf", "upload", repo_id, str(folder), "."]
    upload += [word for pattern in _STALE for word in ("--delete", pattern)]
    upload += ["--revision", revision] if revision else []
    upload += ["--private"] if private else []
    then = ["hf", "repos", "tag", "create", repo_id, str(tag), *(["--revision", revision] if revision else [])]
    return shlex.join(upload) + (f" && {shlex.join(then)}" if tag else "")


def _push_once(
    api: HfApi, folder: Path, repo_id: str, revision: str | None, tag: str | None, private: bool | None, message: str
) -> str:
    _limit_patience()
    _create(api, repo_id, private)
    if revision and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    stale = [name for name in api.list_repo_files(repo_id, revision=revision) if _is_weights(name)]
    operations: list[Any] = [CommitOperationDelete(name) for name in stale if name not in files]
    operations += [CommitOperationAdd(name, str(file)) for name, file in files.items()]
    commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    if tag:
        _tag(api, repo_id, tag, commit.oid)
    return str(commit.commit_url)


def _create(api: HfApi, repo_id: str, private: bool | None) -> None:
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and api.model_info(repo_id).private is False:
        raise PushError(f"{repo_id} exists and is public, and a private one is set: make it private, or choose another")


def _tag(api: HfApi, repo_id: str, tag: str, commit: str) -> None:
    try:
        api.create_tag(repo_id, tag=tag, revision=commit)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        there = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
        if there.get(tag) != commit:
            raise PushError(
                f"the model is there, but tag {tag} was taken by an earlier commit: choose another"
            ) from None


def _holds_weights(folder: Path) -> bool:
    return folder.is_dir() and any(_is_weights(path.name) for path in folder.iterdir())


def _is_weights(name: str) -> bool:
    return "/" not in name and name.endswith(_WEIGHTS)


@functools.cache
def _limit_patience() -> None:
    """From now on a silent server is an error in this process after `TIMEOUT` seconds.

    By a factory, as huggingface_hub makes a new client when a connection fails.
    """
    client = get_session()
    if client.timeout.read is not None:  # the user's own client, with a limit of its own
        return
    kind, hooks = type(client), client.event_hooks
    set_client_factory(lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=TIMEOUT))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """Of the response that the error is about, if there was one."""
    found = [cause.response.status_code for cause in _causes(error) if isinstance(cause, HfHubHTTPError)]
    return found[0] if found else None


def _passes(error: BaseException) -> bool:
    """Whether another attempt may succeed."""
    status = _status(error)
    if status is not None:
        return status in _PASSING or status >= 500
    causes = [*_causes(error)]
    if any(isinstance(cause, (PushError, OfflineModeIsEnabled, LocalTokenNotFoundError)) for cause in causes):
        return False
    # The last are hf_xet's errors, and a page in place of JSON from something in between.
    passing = (_HTTPError, ConnectionError, TimeoutError, RuntimeError, json.JSONDecodeError)
    return any(isinstance(cause, passing) for cause in causes)


def _described(error: BaseException, token: str | bool | None) -> str:
    """An error in one line, and what to do about it where that is known; never with the token or a signed address."""
    causes = [*_causes(error)]
    first = next((cause for cause in causes if isinstance(cause, (_HTTPError, OSError))), causes[-1])
    lines = [line.strip() for line in str(first).splitlines() if line.strip()]
    text = f"{type(first).__name__}: {' '.join(lines[:3])}" if lines else type(first).__name__
    if isinstance(first, OfflineModeIsEnabled):
        text = "huggingface_hub is offline: unset HF_HUB_OFFLINE"
    hint = _HINTS.get(_status(error) or 0)
    text += f" ({hint})" if hint else ""
    for secret in (token, get_token()):
        if secret and isinstance(secret, str):
            text = text.replace(secret, "***")
    return re.sub(r"(://)(?:[^\s/@]+@)?([^\s?'\"]*)(?:\?[^\s'\"]*)?", r"\1\2", text)


def _link(source: str, target: str) -> None:
    """A second name for a file, or a copy on a disk without hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
