"""The MoE layer: routing scores, selection of experts, dispatch, grouped matmul, combine."""
