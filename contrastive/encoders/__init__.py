"""Encoders give one vector a history: SASRec, BSARec, GRU4Rec, or any module of the form of `encoder.Encoder`."""
