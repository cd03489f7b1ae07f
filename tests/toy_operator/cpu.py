# SPDX-License-Identifier: Apache-2.0
"""The toy operator in NumPy."""

from __future__ import annotations

import numpy as np

import toy_operator
from pagedcache.backend.protocol import Implementation, Invalid, LaunchConfig
from pagedcache.tensors import view


class Negate(Implementation):
    def __init__(self, info, device, report):
        self._info, self._report = info, report

    def launch_config(self, rows):
        return LaunchConfig((1, 1, 1), (1, 1, 1))

    def run(self, rows, target, source, stream):
        info = self._info
        there, here = (
            view(address, np.dtype(np.float32), (rows, info.size), (stride * 4, 4))
            for address, stride in ((target, info.target_stride), (source, info.source_stride))
        )
        lucky = np.arange(rows) != toy_operator.UNLUCKY
        there[lucky] = -here[lucky]
        if rows > toy_operator.UNLUCKY:
            self._report.add(Invalid(1, toy_operator.UNLUCKY, toy_operator.UNLUCKY))
