"""Planning a training run on paper: FLOP, memory, days, cost, checkpoints. Needs neither PyTorch nor a GPU."""

from hybridlm.plan.flops import Flops, flops_per_token
from hybridlm.plan.goodput import Faults, Outcome, daly, expected_goodput, simulate, young
from hybridlm.plan.machines import GPU, find_gpu
from hybridlm.plan.memory import Layout, Memory, memory
from hybridlm.plan.run import Cluster, Plan, make_plan

__all__ = ["GPU", "Cluster", "Faults", "Flops", "Layout", "Memory", "Outcome", "Plan", "daly", "expected_goodput",
           "find_gpu", "flops_per_token", "make_plan", "memory", "simulate", "young"]
