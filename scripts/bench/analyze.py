"""Measures the memory and the speed of the layer-by-layer analysis on a checkpoint with random weights.

    python scripts/bench/analyze.py [--folder DIR] [--layers 36] [--hidden 2048] [--samples 4] [--length 2048]

It writes a Llama (bfloat16 safetensors, a file for each layer; with the defaults 4.2 GB) into a
new folder under --folder, one layer at a time, analyses it in a child process, and prints the child's peak resident memory beside
the size of the largest layer and of the checkpoint. Then it compares the time of the layer-by-layer analysis with that of the
whole model on a smaller checkpoint, each in a child, in turn. The folder is removed at the end. Linux and macOS.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# note: this process never imports torch: a child's ru_maxrss begins with the memory that its parent had
VOCABULARY = 32000
SETTINGS = {"sink": 4, "window": 1020, "w_last": 32}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made; the system's temporary folder by default")
    parser.add_argument("--layers", type=int, default=36, help="layers of the large checkpoint")
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size, a multiple of 128")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="tokens of each sample")
    parser.add_argument("--dtype", default="auto", help="what the analysis computes in")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small-layers", type=int, default=8, help="layers of the checkpoint that times are compared on")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=["write", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def layer_shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer of a Llama with grouped queries."""
    inner, kv = hidden * 7 // 2, hidden // 4
    return {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def layer_values(hidden: int) -> int:
    return sum(rows * (columns[0] if columns else 1) for rows, *columns in layer_shapes(hidden).values())


def write(folder: Path, n_layer: int, hidden: int) -> None:
    """Writes the checkpoint, with a layer's memory."""
    import torch
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        values = torch.empty(shape, dtype=torch.bfloat16)
        return values.normal_(std=shape[1] ** -0.5, generator=random)

    weight_map = {}

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    ends = {"model.embed_tokens.weight": tensor(VOCABULARY, hidden), "model.norm.weight": tensor(hidden)}
    save("model-embedding.safetensors", ends | {"lm_head.weight": tensor(VOCABULARY, hidden)})
    for layer in range(n_layer):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}{name}.weight": tensor(*shape) for name, shape in layer_shapes(hidden).items()}
        save(f"model-layer-{layer:03}.safetensors", tensors)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": hidden * 7 // 2,
        "num_hidden_layers": n_layer,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def measure(options: argparse.Namespace) -> None:
    """Analyses the checkpoint in `--folder` and prints a JSON line."""
    import numpy as np

    from lt_gguf.hf import analysis, layer_by_layer  # noqa: F401  all that is imported, before memory is looked at

    imported = peak_memory()
    random = np.random.default_rng(0)
    samples = random.integers(0, VOCABULARY, (options.samples, options.length)).tolist()
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        begin = time.perf_counter()
        ratios = analysis.measure(
            options.folder,
            samples,
            **SETTINGS | {"window": min(SETTINGS["window"], options.length // 2)},
            device=options.device,
            dtype=options.dtype,
            layer_by_layer=not options.whole,
            work_dir=Path(work),
            progress=lambda what, done, total: print(f"\r\x1b[K{what} {done}/{total}", end="", file=sys.stderr, flush=True),
        )
        seconds = time.perf_counter() - begin
    print(file=sys.stderr)
    answer = {"seconds": seconds, "peak": peak_memory(), "imported": imported, "ratios": ratios.mean(axis=0).tolist()}
    print(json.dumps(answer))


def peak_memory() -> int:
    """Bytes that this process has had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_child(what: str, folder: Path, options: argparse.Namespace, n_layer: int, *more: str) -> dict:
    command = [sys.executable, __file__, "--child", what, "--folder", str(folder), "--layers", str(n_layer), *more]
    for name in ("hidden", "samples", "length", "dtype", "device"):
        command += [f"--{name}", str(getattr(options, name))]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output) if output.strip() else {}


def made(folder: Path, options: argparse.Namespace, n_layer: int) -> Path:
    folder.mkdir()
    in_child("write", folder, options, n_layer)
    return folder


def gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB"


def main() -> None:
    options = parse_arguments()
    if options.child:
        write(options.folder, options.layers, options.hidden) if options.child == "write" else measure(options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-analysis-") as scratch:
        large = made(Path(scratch) / "large", options, options.layers)
        size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
        found = in_child("measure", large, options, options.layers)
        layer = 2 * layer_values(options.hidden)
        embedding = 2 * VOCABULARY * options.hidden
        hidden = options.samples * options.length * options.hidden
        print(f"{options.layers} layers, {options.samples} samples of {options.length} tokens, dtype {options.dtype}")
        print("| what | size |\n| --- | --- |")
        print(f"| checkpoint | {gigabytes(size)} |")
        print(f"| its largest layer, in the file (bfloat16) | {gigabytes(layer)} |")
        print(f"| the same in float32 | {gigabytes(2 * layer)} |")
        print(f"| its input embedding, in the file | {gigabytes(embedding)} |")
        print(f"| hidden states of all samples, in float32 | {gigabytes(4 * hidden)} |")
        print(f"| resident after the imports of torch and transformers | {gigabytes(found['imported'])} |")
        print(f"| peak resident memory of the analysis | {gigabytes(found['peak'])} |")
        print(f"| peak less imports | {gigabytes(found['peak'] - found['imported'])} |")
        print(f"| seconds | {found['seconds']:.0f} |")
        for file in large.iterdir():
            file.unlink()
        small = made(Path(scratch) / "small", options, options.small_layers)
        times: dict[str, list[float]] = {"--whole": [], "": []}
        ratios = {}
        for _ in range(options.repeats):
            for way, seconds in times.items():
                found = in_child("measure", small, options, options.small_layers, *filter(None, [way]))
                seconds.append(found["seconds"])
                ratios[way] = found["ratios"]
        whole, by_layer = (statistics.median(seconds) for seconds in times.values())
        apart = max(abs(a - b) for a, b in zip(ratios[""], ratios["--whole"], strict=True))
        print(
            f"\n{options.small_layers} layers: whole {whole:.1f} s, layer by layer {by_layer:.1f} s: "
            f"{by_layer / whole:.2f} times as long (medians of {options.repeats}); ratios at most {apart:.1e} apart"
        )


if __name__ == "__main__":
    main()
