"""Series of numbers, for the head `values`: `input` steps are read, the next `horizon` predicted.

`columns`: the user's csv and parquet files. `tsdata`: files that a package ships. `generated`: Mackey-Glass and Lorenz.
`windows`: what all share. docs/data.md has them in one table.
"""

from zoo.data.series import columns, generated, tsdata  # noqa: F401, which make their sources known
