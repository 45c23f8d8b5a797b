"""What the config.json of weights says, in a folder or on the Hub."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError


def config_of(weights: str) -> dict[str, Any]:
    """What the config.json of weights says, in a folder (a run's too) or on the Hub; empty where there is none.

    A bare word that is not a folder does not name a repository: it is timm's own weights of a model.
    """
    folder = Path(weights).expanduser()
    if folder.exists():
        around = folder if folder.is_dir() else folder.parent
        places = (around / "config.json", around / "model" / "config.json")
        file = next((path for path in places if path.is_file()), None)
    elif "/" not in weights:
        file = None
    else:
        try:
            file = Path(hf_hub_download(weights.removeprefix("hf-hub:"), "config.json"))
        except (OSError, ValueError, HfHubHTTPError):
            file = None
    if file is None:
        return {}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
