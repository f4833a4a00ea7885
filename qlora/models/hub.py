"""Models of the hub: the files of one model, in the hub's own cache.

Asking the hub for the list of files first tells within ten seconds that there is no network, where a download goes on
trying; then what the cache holds serves. The alternative, to read the cache alone, would miss a newer revision.
"""

from __future__ import annotations

import sys
from pathlib import Path

from qlora.errors import guard


def download(model: str, revision: str | None, weights: bool = True) -> Path:
    """The folder of a hub model in the hub's cache: what is new is downloaded, without a network what is there serves.

    Without `weights` only its small files are fetched: config, tokenizer, code.

    Raises:
        UserError: no such model, or no network and nothing in the cache.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    # The class of the HTTP library that this version of the hub speaks with: requests or httpx.
    http_error: type[Exception] = HfHubHTTPError.__mro__[1]
    patterns = ["*.json", "*.model", "*.txt", "*.jinja", "*.py"]
    offline = constants.HF_HUB_OFFLINE
    no_network: Exception | None = None
    rule = "is no local folder and could not be had from the hub"
    with guard("model", model, rule, "Check the name and the network, or give a local folder"):
        if weights and not offline:
            try:  # fails at once, where a download goes on trying for half a minute
                files = [s.rfilename for s in HfApi().model_info(model, revision=revision, timeout=10).siblings or []]
                patterns.append("*.safetensors" if any(f.endswith(".safetensors") for f in files) else "*.bin")
            except HfHubHTTPError:
                raise
            except http_error as error:
                offline, no_network = True, error
        if not offline:  # an adapter may have named it, and nobody typed it
            where = f"{constants.ENDPOINT}/{model}"
            print(f"Fetching {model} from {where}, unless the cache has it", file=sys.stderr, flush=True)
        try:
            return Path(
                snapshot_download(
                    model, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"], local_files_only=offline
                )
            )
        except Exception as error:  # of any kind: what the network said first explains it better
            raise (no_network or error) from None
