# SPDX-License-Identifier: Apache-2.0
from . import benchmark as benchmark
from . import verify as verify
from .flops import count_gflops as count_gflops
from .flops import describe as describe
from .intervals import compare_paired as compare_paired
from .intervals import success_interval as success_interval
