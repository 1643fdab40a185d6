from kernels.delta_rule.api import delta_rule, delta_rule_step

__all__ = ["delta_rule", "delta_rule_step"]
