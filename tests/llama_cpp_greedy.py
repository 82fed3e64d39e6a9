"""Write a Llama-shaped model as GGUF and continue ids by llama.cpp: run by tests with a Python that has both packages.

    python tests/llama_cpp_greedy.py FOLDER NEW_TOKENS < CONTEXTS

FOLDER holds ``config.json`` and ``tensors.npz`` in float32; contexts and continuations are lists of ids in JSON. The
file has no vocabulary of words, so what is compared is the model, and not how two programs cut a text into tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write(folder: Path) -> Path:
    """Write ``model.gguf`` beside the tensors, and return its path."""
    config, tensors = json.loads((folder / "config.json").read_text()), np.load(folder / "tensors.npz")
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name in tensors.files:
        outer, tensor = name.removesuffix(".weight"), tensors[name]
        if outer in _OUTER:
            writer.add_tensor(f"{_OUTER[outer]}.weight", tensor)
            continue
        number, _, inner = outer.removeprefix("model.layers.").partition(".")
        if inner in ("self_attn.q_proj", "self_attn.k_proj"):  # llama.cpp turns neighbours, transformers halves
            count = heads if inner == "self_attn.q_proj" else key_heads
            tensor = tensor.reshape(count, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"blk.{number}.{_NAMES[inner]}.weight", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


def main() -> None:
    """Print what llama.cpp says, the likeliest token each time."""
    folder, count, contexts = Path(sys.argv[1]), int(sys.argv[2]), json.load(sys.stdin)
    model = Llama(str(write(folder)), n_ctx=256, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, verbose=False, n_threads=1)
    said = []
    for context in contexts:
        model.reset()
        tokens = model.generate(context, temp=0.0, top_k=1, repeat_penalty=1.0)
        said.append([int(token) for token, _ in zip(tokens, range(count), strict=False)])
    print(json.dumps(said))


if __name__ == "__main__":
    main()
