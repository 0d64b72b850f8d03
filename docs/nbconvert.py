"""Settings for pages that are read without a kernel; the command stands in thumbnails.py."""

c = get_config()  # noqa: F821 (nbconvert brings it)
# A page cannot run widgets, so their still picture comes first.
c.NbConvertBase.display_data_priority = ["text/html", "image/png", "text/markdown", "text/latex", "text/plain"]
# Once more after the execution: only the last state of a progress bar counts.
c.Exporter.preprocessors = ["nbconvert.preprocessors.CoalesceStreamsPreprocessor"]
