"""Work-aware balance: the documents of a global batch shared out so that no rank waits for another."""

from megatron_prolong.data.balance.assign import EMPTY, Assignment, DocumentIndex, MicroBatchPlan, assign
from megatron_prolong.data.balance.cost import CostModel

__all__ = ["EMPTY", "Assignment", "CostModel", "DocumentIndex", "MicroBatchPlan", "assign"]
