"""What pages and figures are made of: plots, colours, how numbers are written, the frame of a page. Knows no run."""
