"""Labelled sequences, for the head `classes`: a row of tokens or of numbers, and its class.

`listops`: made as it is asked for. `digits`, `mnist1d`, `ucr`: what packages ship. `text`, `images`: the user's files.
`stored`: what all but the first share. docs/data.md has them in one table.
"""

from zoo.data.labelled import digits, images, listops, mnist1d, text, ucr  # noqa: F401, which make their sources known
