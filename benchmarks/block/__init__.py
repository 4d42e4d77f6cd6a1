"""The MoE block alone: router and experts, forward and backward, several implementations in one process."""
