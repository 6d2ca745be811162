"""Run records, and the tables made from them. Nothing here knows how a model is quantized."""
