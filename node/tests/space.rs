//! The space that rows take on the disk.

mod common;

use common::shards::{Shards, put};
use common::small;
use shkv_node::Steps;

const KEYS: usize = 20;
const VALUE_BYTES: usize = 30_000;
const TURNS: usize = 100;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_are_written_over_take_no_more_space_beside_shards_that_rest() {
    let mut shards = Shards::new(1, small(), Steps::default()).await;
    shards.put("i: the second shard has a row, and is then at rest", "1").await;
    let keys: Vec<_> = (0..KEYS).map(|number| format!("a{number}")).collect();
    for turn in 0..TURNS {
        let value = format!("{turn:VALUE_BYTES$}");
        let ops: Vec<_> = keys.iter().map(|key| put(key, &value)).collect();
        shards.batch(&ops, &value.repeat(KEYS), None).await;
    }
    let bytes = std::fs::metadata(shards.group.data(0).join("rows.redb")).unwrap().len();
    let once = KEYS * VALUE_BYTES;
    assert!(bytes as usize <= 10 * once, "{bytes} bytes for {once}, which were written {TURNS} times");
    assert_eq!(shards.get("a7").await.unwrap().trim(), (TURNS - 1).to_string());
    assert_eq!(shards.get("i: the second shard has a row, and is then at rest").await.as_deref(), Some("1"));
}
