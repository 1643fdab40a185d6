"""Elementwise linear recurrence."""

from kernels.linear_scan.api import linear_scan, linear_scan_step

__all__ = ["linear_scan", "linear_scan_step"]
