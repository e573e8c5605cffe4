"""lm-evaluation-harness's own command, for versions of it that don't find models of other packages by themselves.

    python -m lt_gguf.evaluation.lm_eval_cli run --model lt-gguf --model_args model=FILE.gguf --tasks gsm8k

Later ones find it as `lm_eval run --model lt-gguf`.
"""

from lm_eval.__main__ import cli_evaluate

import lt_gguf.evaluation.lm_eval_model  # noqa: F401  (registers the model)

if __name__ == "__main__":
    cli_evaluate()
