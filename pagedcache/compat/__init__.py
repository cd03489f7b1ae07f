# SPDX-License-Identifier: Apache-2.0
"""Write operators of other projects, name for name: change the import and nothing else.

Each module has the signature and layouts of the project it is named after, and takes arrays of any
library. What they check is what `pagedcache.paged_caching` checks, so bad input is an error and a
slot past the end is skipped.
"""
