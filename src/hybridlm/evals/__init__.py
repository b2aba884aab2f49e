"""Evaluations over a small protocol, `Scorer`, that engines and PyTorch models both satisfy.

    from hybridlm.evals.open_task import plan
    from hybridlm.evals.run import run
    result = run(plan("mmlu", folder, engine.tokenizer, engine.context), engine, model={"name": "mine"})

bits_per_byte.py reads text; tasks.py names the benchmarks, prompts.py words them, cases.py turns them into tokens,
run.py scores them; ruler.py and generation.py have the model write; synthetic.py makes arrays to train on; agreement.py
compares two ways to compute the same logits; lm_eval.py is the adapter to lm-evaluation-harness.
"""

from hybridlm.evals.bits_per_byte import BitsPerByte, bits_per_byte, documents_of
from hybridlm.evals.scorer import Scorer

__all__ = ["BitsPerByte", "Scorer", "bits_per_byte", "documents_of"]
