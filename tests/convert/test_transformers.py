"""An exported model opens with transformers' `from_pretrained`, to the last bit; skipped where it is not installed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm_elastic.cli.main import main
from autoglm_elastic.snapshot import CheckpointManager

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own
    transformers = pytest.importorskip("transformers")

WAIT_S = 30.0
TOKENS = torch.arange(24).view(2, 12) % 50
SMALL = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def gpt2(tied: bool) -> Any:
    return transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, n_positions=32, tie_word_embeddings=tied, **SMALL
    )


def llama(tied: bool) -> Any:
    return transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=16,
        intermediate_size=40,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        **SMALL,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard_bytes", [None, 4000], ids=["one file", "shards"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "not tied"])
@pytest.mark.parametrize("config", [gpt2, llama])
def test_what_is_exported_opens_with_from_pretrained(
    run_dir: Path, tmp_path: Path, config: Any, tied: bool, shard_bytes: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config(tied), dtype=dtype).eval()
    with CheckpointManager(run_dir) as manager:
        assert manager.save(1, {"model": model.state_dict(), "step": 1}).wait(WAIT_S).committed
    folder = tmp_path / "exported"
    more = [] if shard_bytes is None else ["--shard-bytes", str(shard_bytes)]
    command = ["ckpt", "export", run_dir, "HEAD", folder, "--to", "hf", "--prefix", "model", *more]
    assert main([str(word) for word in command]) == 0
    assert (folder / "model.safetensors.index.json").exists() is (shard_bytes is not None)
    model.config.save_pretrained(folder)
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, output_loading_info=True
    )
    assert {name: list(some) for name, some in told.items() if some} == {}
    wanted, found = model.state_dict(), loaded.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, loaded.eval()(TOKENS).logits)
