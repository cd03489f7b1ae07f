# SPDX-License-Identifier: Apache-2.0
"""What a paged cache is, whatever is done to it."""
