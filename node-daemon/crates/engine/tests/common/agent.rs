//! An agent: follows the objects, executes swaps, connects again when its engine was restarted.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tercet_engine::pb::engine as pb;
use tercet_engine::pb::engine::engine_client::EngineClient;
use tercet_engine::pb::engine::engine_event::Event;
use tercet_engine::pb::engine::report_swap_request::Outcome;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};
use uuid::Uuid;

use super::objects::Objects;

pub type Client = EngineClient<Channel>;

pub struct Agent {
    socket: PathBuf,
    task: JoinHandle<()>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub async fn connect(socket: PathBuf) -> Option<Client> {
    let endpoint = Endpoint::from_static("http://engine").connect_timeout(Duration::from_secs(1));
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let channel = endpoint.connect_with_connector(connector).await.ok()?;
    Some(EngineClient::new(channel).max_decoding_message_size(64 << 20))
}

impl Agent {
    pub fn start(socket: PathBuf, configure: pb::ConfigureRequest, objects: Arc<Objects>) -> Self {
        let task = tokio::spawn(follow(socket.clone(), configure, objects));
        Self { socket, task }
    }

    /// Tries until the engine answers and says yes.
    async fn persist<T, F: Future<Output = Result<tonic::Response<T>, tonic::Status>>>(
        &self,
        call: impl Fn(Client) -> F,
    ) -> T {
        let start = std::time::Instant::now();
        let mut last = String::from("no connection");
        while start.elapsed() < super::PATIENCE {
            if let Some(client) = connect(self.socket.clone()).await {
                match call(client).await {
                    Ok(answer) => return answer.into_inner(),
                    Err(status) => last = status.to_string(),
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the engine at {} does not do it: {last}", self.socket.display());
    }

    pub async fn create_replica(&self, request: pb::CreateReplicaRequest) -> String {
        let call = |mut client: Client| {
            let request = request.clone();
            async move { client.create_replica(request).await }
        };
        self.persist(call).await.replica
    }

    pub async fn instance(&self) -> String {
        let call = |mut client: Client| async move { client.status(pb::StatusRequest {}).await };
        self.persist(call).await.instance
    }

    pub async fn client(&self) -> Option<Client> {
        connect(self.socket.clone()).await
    }

    pub async fn status(&self) -> Option<pb::StatusResponse> {
        let mut client = self.client().await?;
        Some(client.status(pb::StatusRequest {}).await.ok()?.into_inner())
    }

    pub async fn chunk_sums(&self, volume: Uuid) -> Option<pb::ChunkSumsResponse> {
        let mut client = self.client().await?;
        let request = pb::ChunkSumsRequest { volume: volume.to_string() };
        Some(client.chunk_sums(request).await.ok()?.into_inner())
    }

    pub async fn chunk_map(&self, volume: Uuid) -> Option<pb::ChunkMapResponse> {
        let mut client = self.client().await?;
        let request = pb::ChunkMapRequest { volume: volume.to_string(), from_chunk: 0 };
        Some(client.chunk_map(request).await.ok()?.into_inner())
    }
}

async fn follow(socket: PathBuf, configure: pb::ConfigureRequest, objects: Arc<Objects>) {
    loop {
        if let Some(client) = connect(socket.clone()).await {
            // An engine that died: connect again.
            let _ = serve(client, configure.clone(), &objects).await;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn serve(
    mut client: Client,
    configure: pb::ConfigureRequest,
    objects: &Objects,
) -> Result<(), tonic::Status> {
    let mut changes = objects.watch();
    client.configure(configure).await?;
    let mut events = client.events(pb::EventsRequest {}).await?.into_inner();
    observe_all(&mut client, objects).await?;
    loop {
        tokio::select! {
            event = events.message() => match event? {
                None => return Ok(()),
                Some(event) => carry_out(&mut client, event, objects).await?,
            },
            _ = changes.changed() => observe_all(&mut client, objects).await?,
        }
    }
}

async fn observe_all(client: &mut Client, objects: &Objects) -> Result<(), tonic::Status> {
    for (volume, object) in objects.all() {
        observe(client, volume, object.view(false)).await?;
    }
    Ok(())
}

async fn observe(
    client: &mut Client,
    volume: Uuid,
    view: pb::VolumeView,
) -> Result<(), tonic::Status> {
    let request = pb::ObserveVolumeRequest {
        volume: volume.to_string(),
        name: "pvc-test".into(),
        view: Some(view),
    };
    client.observe_volume(request).await.map(|_| ())
}

async fn carry_out(
    client: &mut Client,
    event: pb::EngineEvent,
    objects: &Objects,
) -> Result<(), tonic::Status> {
    match event.event {
        Some(Event::Swap(swap)) => {
            let volume = Uuid::parse_str(&swap.volume).expect("a volume's id");
            let (old, new) = (swap.old.expect("old"), swap.new.expect("new"));
            let takes = Duration::from_millis(objects.swap_ms.load(Ordering::Relaxed));
            tokio::time::sleep(takes).await;
            let (swapped, object) =
                objects.swap(volume, &old, new).expect("a volume that is there");
            let outcome = if swapped { Outcome::Swapped } else { Outcome::Lost };
            let report = pb::ReportSwapRequest {
                token: swap.token,
                outcome: outcome.into(),
                view: Some(object.view(true)),
            };
            client.report_swap(report).await?;
        }
        Some(Event::Read(read)) => {
            let volume = Uuid::parse_str(&read.volume).expect("a volume's id");
            if let Some(object) = objects.get(volume) {
                observe(client, volume, object.view(true)).await?;
            }
        }
        _ => {}
    }
    Ok(())
}
