"""The way of a token: routing scores, selection of experts, dispatch, grouped matmul, combine."""
