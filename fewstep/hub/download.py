"""Models from the Hugging Face hub, by id, into the cache of `huggingface_hub`. This file knows no format."""

from pathlib import Path

import huggingface_hub

# What a model needs and nothing that can run code. Other names hold the same weights again, for other readers.
PATTERNS = (
    "*.json",
    "*.jinja",
    "model.safetensors",
    "model-*.safetensors",
    "weights.safetensors",
    "medusa_lm_head.safetensors",
    "fewstep/heads.safetensors",
)


def download(name: str) -> Path:
    """The directory of hub model `name` ("owner/name") in the cache, whatever is missing downloaded.

    Without a connection what is in the cache is taken. Raises ValueError when there is no such model, its owner asks for
    consent, or the hub cannot be reached.
    """
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(PATTERNS)))
    except huggingface_hub.errors.GatedRepoError:
        reason, move = "its owner asks for consent", "accept the terms on its page, then run `hf auth login`"
    except huggingface_hub.errors.RepositoryNotFoundError:
        reason, move = (
            "no such directory here and no such model on the hub",
            "check the spelling; for a private one run `hf auth login`",
        )
    except (OSError, huggingface_hub.errors.HFValidationError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = f"no such directory here, and the hub cannot give it ({(str(error).splitlines() or [type(error).__name__])[0]})"
        move = "connect to it, or download the model elsewhere and give its directory"
    raise ValueError(f"model={name!r}: {reason}; {move}")
