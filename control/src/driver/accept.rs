//! The accept loop of the Unix sockets by which programs of this machine talk to us.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

/// Takes connections for ever, `most` of them at once, and gives each to `client` in a task of its
/// own. `who` is what the log calls it.
pub(super) async fn serve<F>(
    listener: UnixListener,
    most: usize,
    who: &'static str,
    client: impl Fn(UnixStream) -> F,
) where
    F: Future<Output = anyhow::Result<()>> + 'static,
{
    let slots = Arc::new(Semaphore::new(most));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let client = client(stream);
                tokio::task::spawn_local(async move {
                    let _slot = slot;
                    if let Err(error) = client.await {
                        tracing::debug!(%error, "{who} client");
                    }
                });
            }
            Err(error) => {
                // Out of descriptors, most likely: wait for some to come back.
                tracing::warn!(%error, "{who} socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}
