"""Operations on boxes and masks for detection, in static shapes. Boxes are (x1, y1, x2, y2) in pixels."""
