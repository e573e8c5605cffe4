"""From a Hugging Face checkpoint to a hybrid GGUF file: measures, selects, converts, quantizes, reports.

`convert` holds the steps, `options` what can be asked for; `upstream` drives llama.cpp's own converter, which runs in a process of
its own (`worker`), and `quantization` llama-quantize.
"""

from lt_gguf.conversion.convert import ConversionError, Converted, Progress, convert

__all__ = ["ConversionError", "Converted", "Progress", "convert"]
