"""The gate's verdict on a candidate, and the scores of the champion that it rests on."""
