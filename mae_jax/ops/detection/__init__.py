"""What detection computes of boxes and masks, in static shapes; all coordinates are (x1, y1, x2, y2) in pixels."""
