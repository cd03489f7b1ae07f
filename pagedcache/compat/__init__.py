# SPDX-License-Identifier: Apache-2.0
"""Write functions with the names and signatures of other projects: change only the import.

Each module follows the project that it is named after, also in its layouts, and takes arrays of any
library. The checks are those of `pagedcache.paged_caching`: bad input raises an error, and a slot
past the end of the cache is skipped.
"""
