"""Run records, and tables, pictures and pages made from them and from what core knows of a quantized model."""
