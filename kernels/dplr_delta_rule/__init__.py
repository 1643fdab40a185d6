from kernels.dplr_delta_rule.api import dplr_delta_rule, dplr_delta_rule_step

__all__ = ["dplr_delta_rule", "dplr_delta_rule_step"]
