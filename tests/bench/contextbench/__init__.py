"""How long a row may be: steps over one long row, under caps of GPU memory."""
