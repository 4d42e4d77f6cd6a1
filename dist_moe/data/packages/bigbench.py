"""The members of BIG-bench's source archive that examples are made of (Srivastava et al. 2022, arXiv 2206.04615).

Its files ask to be in no corpus that language models are trained on: they are sources of labeled examples alone.
"""

from dist_moe.data.packages.archive import Archive

TASKS = "bigbench-1.0.0/bigbench/benchmark_tasks"
VITAMINC_FILE = "task.json"
SQUAD_FILES = {
    "amazon_reviews_v1.0.json": "3d3b16b874aefef754d04c1cbd64457b3a6456aa2e946a6132b8254c17e34c4a",
    "new_wiki_v1.0.json": "428104b87438d9059eb5df2883267cf9d30f6f4fcaed92e72107c8b913eaea40",
    "nyt_v1.0.json": "a770cdc1b460e3bd256a9f95aae021ed6502768b1713be777f3dd8740a4a1965",
    "reddit_v1.0.json": "db57c9269e4965fdb5dc045afb00e02f03668790ad6f66ab0354bf74b0fc63fe",
    "squaddev_v1.1.json": "45089eff3cf52004b1dca6814cde5c57082fdb09872f18c79a5d944d45be523a",
}
"""SHA-256 of the files of questions on paragraphs, by name."""
BIGBENCH = Archive(
    source="bigbench",
    index="PyPI",
    package="bigbench",
    version="1.0.0",
    name="bigbench-1.0.0.tar.gz",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    bytes=358_249_635,
    members={
        f"{TASKS}/vitaminc_fact_verification/{VITAMINC_FILE}": (
            "10f83da50374701fc7ce69162a7a167b14e1a86351201aa8bf14b56fa0a3214f"
        ),
        **{f"{TASKS}/squad_shifts/{name}": sha256 for name, sha256 in SQUAD_FILES.items()},
    },
    remedy="use a source that is smaller: data.sources=[rotten_tomatoes]",
)
