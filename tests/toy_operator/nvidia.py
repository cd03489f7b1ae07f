# SPDX-License-Identifier: Apache-2.0
"""The toy operator on a GPU."""

from __future__ import annotations

from pathlib import Path

import toy_operator
from pagedcache.backend.nvidia import source
from pagedcache.backend.nvidia.parameters import divisor, structure
from pagedcache.backend.protocol import Implementation, LaunchConfig

FILE = Path(__file__).with_name("negate.cuh")
THREADS = 128


class Negate(Implementation):
    def __init__(self, info, device, report):
        self._info, self._device, self._report = info, device, report
        [self._function] = device.compile(FILE, ("toy::negate",))
        text = source.read(FILE)
        self._parameters = structure(text, "NegateParameters")(
            size=divisor(structure(text, "Divisor"), info.size),
            columns=info.size,
            unlucky=toy_operator.UNLUCKY,
            target_stride=info.target_stride,
            source_stride=info.source_stride,
        )

    def launch_config(self, rows):
        return LaunchConfig((-(-rows * self._info.size // THREADS), 1, 1), (THREADS, 1, 1))

    def run(self, rows, target, source, stream):
        launch = self._device.prepare(self._function, 1, THREADS, self._parameters)
        launch.pack(target, source, rows, self._report.address)
        launch.run(self.launch_config(rows).grid[0], stream)
        self._report.note(stream)
