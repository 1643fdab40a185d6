"""Mamba's selective scan."""

from kernels.selective_scan.api import selective_scan, selective_scan_step

__all__ = ["selective_scan", "selective_scan_step"]
