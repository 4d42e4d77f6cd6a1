"""The public functions and classes of the package, and their modules, which `import dist_moe` imports on first use."""

PUBLIC: dict[str, str] = {
    "Balancer": "dist_moe.attach.balancer",
    "Layer": "dist_moe.attach.balancer",
    "Load": "dist_moe.attach.load",
    "LoadWriter": "dist_moe.attach.writer",
    "UserError": "dist_moe.errors",
    "balance": "dist_moe.attach.balancer",
    "clip_grad_norm_": "dist_moe.replace.parallel",
    "expert_parameters": "dist_moe.replace.parallel",
    "from_pretrained": "dist_moe.replace.loading",
    "parallelize": "dist_moe.replace.parallel",
    "route": "dist_moe.replace.routing",
    "save_pretrained": "dist_moe.replace.saving",
}
