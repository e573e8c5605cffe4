"""One attention operation of ggml on the CPU, by our kernel or by ggml's own, and the same in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import gguf
import numpy as np

from lt_gguf.runtime.library import load_llama_cpp

load_llama_cpp()

F16, F32 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32
_PARAMS = 84  # bytes before op_params in ggml_tensor
_OURS = (15, 0x6C74)  # LT_CPU_ATTENTION_PARAM, LT_CPU_ATTENTION_ON
_MEMORY = 64 << 20  # bytes, of what an operation needs besides


class _Params(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Plan(ctypes.Structure):
    _fields_ = (
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        ("threadpool", ctypes.c_void_p),
        ("abort_callback", ctypes.c_void_p),
        ("abort_callback_data", ctypes.c_void_p),
        ("use_ref", ctypes.c_bool),
    )


def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    from lt_gguf.runtime.library import library_dir

    folder = library_dir()
    base, cpu = (ctypes.CDLL(str(next(folder.glob(pattern)))) for pattern in ("libggml-base.*", "libggml-cpu.*"))
    pointer, n, f = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    for name, arguments in {
        "ggml_init": [_Params],
        "ggml_new_tensor_4d": [pointer, ctypes.c_int, n, n, n, n],
        "ggml_permute": [pointer, pointer, *[ctypes.c_int] * 4],
        "ggml_flash_attn_ext": [pointer, pointer, pointer, pointer, pointer, f, f, f],
        "ggml_mul_mat": [pointer, pointer, pointer],
        "ggml_soft_max_ext": [pointer, pointer, pointer, f, f],
        "ggml_get_data": [pointer],
        "ggml_new_graph": [pointer],
    }.items():
        getattr(base, name).argtypes, getattr(base, name).restype = arguments, pointer
    base.ggml_flash_attn_ext_add_sinks.argtypes = [pointer, pointer]
    base.ggml_build_forward_expand.argtypes = [pointer, pointer]
    base.ggml_free.argtypes = [pointer]
    cpu.ggml_graph_plan.argtypes, cpu.ggml_graph_plan.restype = [pointer, ctypes.c_int, pointer], _Plan
    cpu.ggml_graph_compute.argtypes = [pointer, ctypes.POINTER(_Plan)]
    return base, cpu


class Operation:
    """One that is ready. `result`: float32, flat."""

    def __init__(self, result: np.ndarray, cpu: ctypes.CDLL, graph: int) -> None:
        self.result = result
        self._cpu, self._graph = cpu, graph
        self._work = np.empty(0, np.uint8)

    def compute(self, n_threads: int) -> None:
        plan = self._cpu.ggml_graph_plan(self._graph, n_threads, None)
        if plan.work_size > self._work.size:
            self._work = np.empty(plan.work_size, np.uint8)
        plan.work_data = self._work.ctypes.data
        assert self._cpu.ggml_graph_compute(self._graph, ctypes.byref(plan)) == 0


@dataclass
class Attention:
    """What is computed.

    q: float32 (streams, queries, heads, dim); k and v: float32 (streams, cells, KV heads, dim), already rounded to their types; mask:
    float16 (streams, queries, cells), what is added to the scores, or `None`; sinks: float32 (heads,) or `None`.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    mask: np.ndarray | None
    sinks: np.ndarray | None = None
    type_k: gguf.GGMLQuantizationType = F16
    type_v: gguf.GGMLQuantizationType = F16
    softcap: float = 0.0
    max_bias: float = 0.0

    @property
    def scale(self) -> float:
        return float(1 / np.sqrt(self.q.shape[-1]))

    def run(self, ours: bool = True, n_threads: int = 1) -> np.ndarray:
        """float32 (streams, queries, heads, dim of a value)."""
        with self.operation("ours" if ours else "flash") as operation:
            operation.result[:] = np.nan
            operation.compute(n_threads)
            return operation.result.reshape((*self.q.shape[:3], self.v.shape[-1])).copy()

    @contextmanager
    def operation(self, which: str) -> Iterator[Operation]:
        """`which`: `ours`, `flash` (ggml's flash attention), or `products`, what llama.cpp computes without flash attention: the scores of
        all cells, their softmax, the sum, from values that are held transposed."""
        base, cpu = _libraries()
        context = base.ggml_init(_Params(self._n_bytes(), None, False))
        try:
            q, k = (self._tensor(base, context, x, t) for x, t in ((self.q, F32), (self.k, self.type_k)))
            mask = None if self.mask is None else self._tensor(base, context, self.mask[:, None], F16)
            q, k = (base.ggml_permute(context, x, 0, 2, 1, 3) for x in (q, k))
            if which == "products":
                v = self._tensor(base, context, self.v.transpose(0, 2, 3, 1), self.type_v)
                scores = base.ggml_soft_max_ext(context, base.ggml_mul_mat(context, k, q), mask, self.scale, self.max_bias)
                out = base.ggml_mul_mat(context, v, scores)
            else:
                v = base.ggml_permute(context, self._tensor(base, context, self.v, self.type_v), 0, 2, 1, 3)
                out = base.ggml_flash_attn_ext(context, q, k, v, mask, self.scale, self.max_bias, self.softcap)
                if self.sinks is not None:
                    base.ggml_flash_attn_ext_add_sinks(out, self._tensor(base, context, self.sinks[None, None, None], F32))
            if which == "ours":
                ctypes.c_int32.from_address(out + _PARAMS + 4 * _OURS[0]).value = _OURS[1]
            graph = base.ggml_new_graph(context)
            base.ggml_build_forward_expand(graph, out)
            n = int(np.prod(self.q.shape[:3])) * self.v.shape[-1]
            data = (ctypes.c_float * n).from_address(base.ggml_get_data(out))
            yield Operation(np.frombuffer(data, np.float32), cpu, graph)
        finally:
            base.ggml_free(context)

    def _n_bytes(self) -> int:
        """Of the tensors, and of what computes them."""
        n_scores = int(np.prod(self.q.shape[:3])) * self.k.shape[1]
        mask = 0 if self.mask is None else self.mask.size
        return _MEMORY + 4 * (self.k.size + self.v.size + self.q.size) + 2 * mask + 8 * n_scores

    @staticmethod
    def _tensor(base: ctypes.CDLL, context: int, values: np.ndarray, type_: gguf.GGMLQuantizationType) -> int:
        tensor = base.ggml_new_tensor_4d(context, int(type_), *reversed(values.shape))
        data = gguf.quants.quantize(np.ascontiguousarray(values, np.float32), type_)
        ctypes.memmove(base.ggml_get_data(tensor), np.ascontiguousarray(data).ctypes.data, data.nbytes)
        return tensor

    def slopes(self) -> np.ndarray:
        """ALiBi's, (heads,): of arXiv 2108.12409."""
        n_head = self.q.shape[2]
        if not self.max_bias:
            return np.ones(n_head)
        n = 2 ** int(np.log2(n_head))
        heads = np.arange(n_head)
        first, others = 2.0 ** (-self.max_bias * (heads + 1) / n), 2.0 ** (-self.max_bias / 2 * (2 * (heads - n) + 1) / n)
        return np.where(heads < n, first, others)

    def expected(self) -> np.ndarray:
        """float64."""
        n_group = self.q.shape[2] // self.k.shape[2]
        q, k, v = self.q.astype(float), *(np.repeat(x.astype(float), n_group, axis=2) for x in (self.k, self.v))
        scores = np.einsum("sqhd,schd->shqc", q, k) * self.scale
        if self.softcap:
            scores = self.softcap * np.tanh(scores / self.softcap)
        if self.mask is not None:
            with np.errstate(invalid="ignore"):
                scores = scores + self.slopes()[:, None, None] * self.mask.astype(float)[:, None]
        if self.sinks is not None:
            sinks = np.broadcast_to(self.sinks.astype(float)[:, None, None], (*scores.shape[:3], 1))
            scores = np.concatenate([scores, sinks], axis=-1)
        top = scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
        total = weights.sum(axis=-1, keepdims=True)
        weights = weights / np.where(total > 0, total, 1)
        return np.einsum("shqc,schd->sqhd", weights[..., : k.shape[1]], v)


def rounded(values: np.ndarray, type_: gguf.GGMLQuantizationType) -> np.ndarray:
    """As a cache of that type holds them."""
    return gguf.quants.dequantize(gguf.quants.quantize(values.astype(np.float32), type_), type_)
