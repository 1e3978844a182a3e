//! What allocations have used.

use tonic::Status;
use turnpike_proto::v1;

use super::{allocation_id, refusal};
use crate::replica::Replica;
use crate::usage::{self, Totals, Usage, UsageFilter, began};

pub(super) async fn list(replica: &Replica, request: v1::ListUsageRequest) -> Result<v1::ListUsageResponse, Status> {
    let filter = UsageFilter {
        user: Some(request.user).filter(|user| !user.is_empty()),
        id: Some(request.id).filter(|id| !id.is_empty()).map(|id| allocation_id(&id)).transpose()?,
    };
    let size = usize::try_from(request.page_size).unwrap_or(usize::MAX);
    let page = usage::list(&*replica.store, &filter, size, &request.page_token).await;
    let page = page.map_err(|error| refusal(&error))?;
    let page = page.ok_or_else(|| Status::invalid_argument("the page token is not valid"))?;
    Ok(v1::ListUsageResponse {
        usage: page.usage.into_iter().map(message).collect(),
        next_page_token: page.next.unwrap_or_default(),
    })
}

fn message(usage: Usage) -> v1::AllocationUsage {
    let (ended_at, reason) = usage.ended.unwrap_or_default();
    let Totals { packets_to_peer, bytes_to_peer, packets_to_client, bytes_to_client } = usage.totals;
    v1::AllocationUsage {
        id: usage.id.to_text(),
        username: usage.user,
        node_id: usage.node_id,
        relay_address: usage.relay_address.to_string(),
        started_at: began(usage.id),
        ended_at,
        reason: v1::EndReason::from(reason).into(),
        packets_to_peer,
        bytes_to_peer,
        packets_to_client,
        bytes_to_client,
        unclean: usage.unclean,
        counted_at: usage.counted_at,
    }
}
