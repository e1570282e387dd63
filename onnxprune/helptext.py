"""`--help` of commands with many options: under headings, by what they are about."""

from __future__ import annotations

import click

MANY = 14  # options from which on headings help
LAST, REST = "What is said", "Other"
HEADINGS = {
    "What goes": "ratio ratios of granularity scope exclude layer_ratios min_keep align target allow_io",
    "How it is chosen, and what makes up for it": "criterion criteria allocation allocations compensation steps seed",
    "Samples": "calibration samples evaluation metric preprocess",
    "Proof": "verify feeds shapes",
    "What is written": "output state plan_out report_path curves plot json_path shard_size",
    "Time and memory": "provider threads seconds jobs memory",
    LAST: "gates quiet verbose",
}


class Grouped(click.Command):
    """A command whose help has its options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        given = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        records = [(param.name or "", record) for param in given if (record := param.get_help_record(ctx)) is not None]
        if len(records) < MANY:
            super().format_options(ctx, formatter)
            return
        heading = {name: title for title, names in HEADINGS.items() for name in names.split()}
        heading |= {name: LAST for name, (flags, _) in records if "--help" in flags}  # which click names as it likes
        for title in (*HEADINGS, REST):
            if under := [record for name, record in records if heading.get(name, REST) == title]:
                with formatter.section(title):
                    formatter.write_dl(under)
