"""Loading through transformers, whose own code for these models comes with the weights."""

from typing import Any

from brainfusion.genetics.extraction.models import (
    ModelConfig,
    choose_device,
    device_facts,
    hash_weights,
    hub_name,
)
from brainfusion.genetics.extraction.packages import require
from brainfusion.runtime.errors import UserError


def load_pretrained(
    config: ModelConfig, *, organisation: str, model_class: str
) -> tuple[Any, Any, str, dict[str, Any]]:
    """A tokenizer and a model in evaluation mode.

    Args:
        config: What to load.
        organisation: Whose it is on the hub.
        model_class: "AutoModel" or "AutoModelForCausalLM".

    Returns:
        Tokenizer, model, device, and what provenance should say of them.

    Raises:
        UserError: A package or the weights are missing.
    """
    import torch

    transformers = require("transformers", purpose=config.model)
    device = choose_device(config.device)
    name = hub_name(config, organisation)
    options: dict[str, Any] = {"trust_remote_code": True}
    if config.revision is not None:
        options["revision"] = config.revision
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
        model = getattr(transformers, model_class).from_pretrained(name, **options)
    except ImportError as error:
        raise UserError(
            f"the code that comes with '{name}' needs a package that is not installed "
            f"({_first_line(error)}): install it, on a machine with a CUDA GPU."
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"'{name}' cannot be loaded ({_first_line(error)}): download it where the hub can be "
            f"reached ('hf download {name}'), or give its folder with --weights."
        ) from error
    dtype = "float32" if config.dtype == "auto" else config.dtype
    model = model.eval().to(device=device, dtype=getattr(torch, dtype))
    hashed = hash_weights(config.weights)
    facts = {
        **device_facts(device),
        "token_dtype": dtype,
        **({"revision": found} if (found := getattr(model.config, "_commit_hash", None)) else {}),
        **({"weights_hash": hashed} if hashed else {}),
    }
    return tokenizer, model, device, facts


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} ..."
