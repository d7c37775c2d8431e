"""`pagoda report`: one HTML file that tells how a run went, from what lies in its work directory."""
