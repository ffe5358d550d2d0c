"""The scans of state-space mixers: fast paths beside sequential references, and the causal convolution before them."""

from bayes_dispatch.model.mambaformer.scan.convolution import causal_convolution
from bayes_dispatch.model.mambaformer.scan.selective import (
    selective_scan,
    selective_scan_ref,
    selective_step,
    selective_step_,
)
from bayes_dispatch.model.mambaformer.scan.ssd import ssd_scan, ssd_scan_ref, ssd_step

__all__ = [
    "causal_convolution",
    "selective_scan",
    "selective_scan_ref",
    "selective_step",
    "selective_step_",
    "ssd_scan",
    "ssd_scan_ref",
    "ssd_step",
]
