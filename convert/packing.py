"""What an export in 4 bits would pack."""

from convert.description import Description
from convert.export import Export
from convert.export_format import FLOAT4, FLOAT4_GROUP, FORMATS, ExportFormat


def packed_inputs(base: Description, requantize: bool) -> list[int]:
    """Input widths of the linear layers that the family's first 4-bit format packs."""
    native = None if base.native is None or requantize else base.native.group_size
    forms = (
        ExportFormat(name, FLOAT4_GROUP if name == FLOAT4 else native or 32, requantize=requantize)
        for name in FORMATS
        if name in base.family.formats
    )
    form = next((form for form in forms if form.is_packed), None)
    return [] if form is None else Export(base, base.widths, form).packed_inputs
