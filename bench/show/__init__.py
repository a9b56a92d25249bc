"""What a person sees of rows: tables, plots, a page; and what is published of them."""
