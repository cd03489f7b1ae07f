# SPDX-License-Identifier: Apache-2.0
"""Which device? One folder for each type of device, found through the registry.

- `protocol`: what a backend, its devices, their reports and an operator's implementation are
- `registry`: from a device type to its backend
- `handle`: a device, as callers hold it
- `cpu`, `nvidia`, `rocm`: the backends of this package

Nothing in here knows an operator. An operator brings an implementation for the devices of this
package; the devices of another package may bring implementations of their own.
"""
